"""How a worker's report gets into a row of a W&B run. In the order of its way:

outbox.py      a process's reports under way to the pipeline actor
actor.py       receives them, and starts, restarts and finishes the run
store.py       keeps all that must survive the actor; a push is one transaction
steps.py       says when a step has all its reports
reduction.py   makes one row of them
writer.py      gives the rows to the W&B run, by number, and says which of them are there

values.py (what may be logged), artifacts.py, ledger.py (the account), guest.py (what the run must know of the process
that it belongs to), exits.py (how that ends) and wandb_internals.py (what of wandb is used without being public) serve
these.
"""

import os

# Under `uv run` Ray would move every worker into a copy of the working directory and build a second environment there.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # read when ray is imported, so import this before
