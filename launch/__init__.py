"""Commands: argument parsing and words to people."""

import signal
import sys

# Ctrl-C while a command is still being imported ends it without a traceback; `cli.command.run` takes over from here.
# While Python looks for the module of `python -m`, the program's name is "-m".
if sys.argv and (sys.argv[0] == "-m" or sys.argv[0].endswith("/captioning")):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
