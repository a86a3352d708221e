"""`milpa-coordinator`, one file a command. Heavy imports happen inside the functions, so that `--help` is quick."""
