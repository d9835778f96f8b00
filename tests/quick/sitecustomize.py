"""What each Python process of the tests does first: at its end it will not search all of wandb for garbage."""

import atexit
import gc
import sys

atexit.register(lambda: "wandb" in sys.modules and gc.freeze())
