"""The verbs that change a model: they plan, check the plan, and then change the modules."""
