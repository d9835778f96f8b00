"""How what a worker logs gets into a row of a W&B run.

    worker: log → outbox → pipeline actor: inbox → pipeline → state → writer → W&B

A *report* is one call of `log`. An *outbox* is a file into which one process appends its reports. A *row* is what W&B
has of a step: all reports of it, reduced to one. To read it, begin with these, in this order:

values.py      what may be logged, and how it is packed
outbox.py      takes a report in the worker's process; page.py says who logs there, records.py what is in the file
reading.py     reads the outboxes of a node; relay.py does so on the other nodes, and brings what it has read
inbox.py       who has logged what is read, and for which pipeline it is
steps.py       when a step is over; reduction.py makes a row of its reports; pipeline.py has both
state.py       what must survive the pipeline actor, in an SQLite file
run.py         reads, commits and gives rows to W&B
writer.py      the W&B run, which starting.py starts
host.py        hosts a run in the process of its actor; actor.py is what others can ask of that

The process that makes a run: owner.py starts the actor and calls it, exits.py says how the process ends, arguments.py
checks what the code says. recover.py goes on with, or finishes, what a dead actor has left.

What else workers log: artifacts.py and staging.py, media.py (W&B's data types), said.py (alerts, config, log lines).

What these share: ledger.py (the account), files.py, process.py (what a process knows of itself), nodes.py (the nodes'
CPUs and GPUs), and for what is not public ray_internals.py, wandb_internals.py and transaction_log.py.
"""

import os

# Under `uv run` Ray would move every worker into a copy of the working directory and build a second environment there.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # read when ray is imported, so import this before
