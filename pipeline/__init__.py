"""A run from its request to its report: configuration, plan, driver, record, and the commands."""
