"""How what a worker logs gets into a row of a W&B run.

    worker: log → outbox → pipeline actor: inbox → steps → row → W&B

A *report* is one call of `log`. A worker's process appends its reports to files of its own, its *outbox*. The *pipeline
actor* reads the outboxes of its node; on other nodes a *relay* does, and brings it what is there. A *row* is what W&B
has of a step: all reports of it, reduced to one.

The way of a report is a dozen functions. Read these in this order, and what is around them when you need it:

in the worker
`Handle.log`                     common.py: a `WandbRun` is a handle
`as_report`, `pack_report`       values.py: what may be logged, and how it is packed
`Outbox.put`                     outbox.py: appends it to this process's files, and waits if too much is unread
`OpenFiles.write`                records.py: these files; process.py knows who logs, files.py where they are

in the pipeline actor
`Host._read_on`                  host.py: reads again and again; actor.py has what others can ask of the actor
`Run.read`                       run.py: does all that follows
`Reader.read`                    reading.py: finds the node's outboxes; tail.py reads one, page.py says who lives
`Inbox.take`                     inbox.py: whose a report is, and which pipeline's
`Steps.log`, `Steps.end`         steps.py: when a step is over
`Pipeline._row`                  pipeline.py: reports in, numbered rows out
`reduce_reports`                 reduction.py: the reports of a step as one row
`Run._save`                      run.py: first to the state (state.py, an SQLite file), then to W&B
`Writer.log`                     writer.py: the W&B run, which starting.py starts

on another node
`Relay.read`                     relay.py: the same reading; the pipeline actor takes what it brings

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
wandb_internals.py, transaction_log.py and media.py.
"""

import os

# Under `uv run` Ray would move every worker into a copy of the working directory and build a second environment there.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # read when ray is imported, so import this before
