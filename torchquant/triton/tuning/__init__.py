"""Choice of kernel configurations by measuring; a file keeps the choices."""
