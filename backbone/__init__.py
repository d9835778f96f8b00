"""How a worker's report gets into a row of a W&B run. In the order of its way:

outbox.py      takes it in the worker's process
wire.py        brings it to the pipeline actor, in batches; backlog.py has what is under way, inbox.py what arrives
actor.py       receives it; starts, restarts and finishes the run, which is run.py, without Ray
pipeline.py    keeps it in the store until its step is over
steps.py       says when that is
reduction.py   makes one row of all reports of a step
store.py       keeps the row under a number: all that must survive the actor; a push is one transaction
writer.py      gives the rows to the W&B run, and says which of them are there

How a run begins and ends: starting.py, last_words.py (of the workers), ending.py (without its actor), owner.py and
exits.py (the process that made it), guest.py (what the run must know of that). What serves all of these: values.py
(what may be logged), media.py (W&B's data types), artifacts.py, ledger.py (the account), events.py, process.py,
calls.py, files.py, disk.py, nodes.py, transaction_log.py and wandb_internals.py (what of wandb is used without being
public).
"""

import os

# Under `uv run` Ray would move every worker into a copy of the working directory and build a second environment there.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # read when ray is imported, so import this before
