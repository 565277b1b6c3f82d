"""The model, its processor and its tracker: flat modules that also run from a Hub repository, without this package."""
