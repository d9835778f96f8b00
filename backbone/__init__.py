"""How what a worker logs gets into a row of a W&B run.

    worker: log → outbox → pipeline actor: inbox → steps → row → W&B

A *report* is one call of `log`. A worker's process appends its reports to files of its own, its *outbox*. The *pipeline
actor* reads the outboxes of its node; on other nodes a *relay* does, and brings it what is there. A *row* is what W&B
has of a step: all reports of it, reduced to one.

It begins in `Handle.log`, in common.py: a `WandbRun` is a handle. To follow a report from there, read these, in this
order:

values.py      what may be logged, and how it is packed
process.py     who logs in this process, and where its outboxes are; files.py has the folders
records.py     how a report is written, and into which files; page.py says who writes, and whether that process lives
outbox.py      takes a report in the worker's process: all of the above together
reading.py     finds the outboxes of a node; tail.py reads what is new in one
inbox.py       knows who has logged it, and hands it to its pipeline
steps.py       when a step is over
reduction.py   the reports of a step as one row
pipeline.py    a pipeline of a run: reports in, numbered rows out
state.py       what must survive the pipeline actor, in an SQLite file
writer.py      gives rows to the W&B run, which starting.py starts
run.py         does all this, in an order in which a death at any moment does no harm: see `Run._save`
host.py        calls that again and again in the pipeline actor; actor.py has what others can ask of it
relay.py       the same reading, on other nodes

What happens when something dies:

a worker           The lock of its page is free, so the reader says that it has ended. `Steps.end` needs no more of it.
a relay            Another one is started. What was not committed is still on its node.
a node             What it has not brought is named in the ledger, which is not `ok`.
the pipeline actor Ray starts it again, and takeover.py opens its state. Rows that W&B misses are logged again.
wandb-core         The pipeline actor ends itself, and comes back with a new one.
the owner          The process that made the run: the pipeline actor finishes the run as that has ended.
all of Ray         recover.py finishes the run without the actor: its owner calls it, the dying actor does, or you.

The process that makes a run: arguments.py checks what the code says, owner.py starts the pipeline actor, calls.py calls
it, exits.py says how the process ends.

What else workers log: said.py has alerts, config, summary and log lines. staging.py brings an artifact's files to the
run's folder, artifacts.py logs them. media.py knows W&B's data types.

What these share: ledger.py is the account. nodes.py knows the nodes. What is not public is in ray_internals.py,
wandb_internals.py and transaction_log.py.
"""

import os

# Under `uv run` Ray would move every worker into a copy of the working directory and build a second environment there.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # read when ray is imported, so import this before
