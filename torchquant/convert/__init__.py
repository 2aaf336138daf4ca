"""The verbs that change a model: plan first, check the plan, then change the modules."""
