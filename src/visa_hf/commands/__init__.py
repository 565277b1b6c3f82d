"""The commands of `visa`, a file each: `add_arguments(parser)` says what a command takes, `run(args)` does it."""
