"""Extend peft: now, or when the program imports it."""

# peft may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from types import ModuleType

from torchquant.integrations.on_import import when_imported


def register() -> None:
    """Make peft accept quantized and prepared layers; further calls change nothing.

    A call is only needed to find out why peft refuses the layers: ``import torchquant`` extends
    peft as soon as it is imported.

    Raises:
        ImportError: peft is not installed, or it is a version that torchquant cannot extend.

    Example:
        >>> import torchquant  # doctest: +SKIP
        >>> torchquant.integrations.peft.register()  # doctest: +SKIP
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "register: peft must be installed, but it cannot be imported; pip install peft"
        ) from error
    try:
        _extend(peft)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"register: peft must be a version that torchquant can extend, got {peft.__version__}: "
            f"{error}"
        ) from error


def register_on_import() -> None:
    """Extend peft if it is imported, otherwise when it is."""
    when_imported("peft", _extend)


def _extend(module: ModuleType) -> None:
    # Imported here, so that `import torchquant` does not read files that only peft needs.
    from torchquant.integrations.peft.all_linear import extend_all_linear
    from torchquant.integrations.peft.ia3 import extend_ia3
    from torchquant.integrations.peft.lora import extend_lora
    from torchquant.integrations.peft.others import extend_all

    extend_lora()
    extend_ia3()
    extend_all()
    extend_all_linear()
