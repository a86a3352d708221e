"""The coordinator: distils, proves, signs, publishes, merges. It may be away for a month; no node waits for it.

ranch/       the shipped task: a simulator of what ranch sensors see      forge/       teacher to student to evidence
federation/  rounds: the guarded SuperLink, collect, admit, merge, gate   fleet/       ledger, signed repository, listening
dashboard/   what operators see                                           commands/    the command line, one file a command
app.py       builds everything for `serve`                                settings.py  what one can set
"""
