"""How what a worker logs gets into a row of a W&B run.

    worker: log → outbox → pipeline actor: inbox → steps → row → W&B

A *report* is one call of `log`. A *row* is what W&B has of a step: all reports of it, reduced to one. This text tells
the whole way. The functions at the left are the way as code: some twenty minutes, in this order.

**In the worker.** A process that logs has an *outbox*: files below `wandb-run-…/outboxes` in the temporary folder.
Its records are in *segments* of 1 MB, and each record is appended with one `os.write`. So when `log` has returned,
the kernel has the report, unless it is lost (below), whatever becomes of the process. Beside the segments is the
outbox's *page*. The process holds a lock on it as long as it lives, and counts there what is lost. The reader writes
there how far it has read.

`log` waits while 4,096 reports or 32 MB of the process are unread. A reader that makes no progress in five seconds is
no longer waited for. From then on a report is lost if 1 GB is unread, or if less than a tenth of the disk is free. It
is also lost whenever it can't be written. The *ledger*, the account of the run, has what the page counts.

`Handle.log`                          common.py: a `WandbRun` is a handle; values.py says what may be logged
`Outbox.put`, `Outbox._may_write`     outbox.py: waits for the reader, or loses a report; page.py has the limits
`OpenFiles.write`, `Segments.append`  records.py: the record; process.py knows who logs, files.py where the files are

**In the pipeline actor.** It looks at all outboxes of its node up to fifty times a second, and at once while there is
more. One reading has about 1 MB, or one larger record, and each outbox has an equal share of it. The records of a
node are in the order of time, also across readings: where an outbox is not read to its end, what is later in the
others waits for the next reading. When the lock of a page is free, its process has ended. The reader adds a record
that says so, behind the last one of that outbox.

When a step is over, its reports become a row. That is so when as many workers as `WandbRun(workers=…)` says have
reported it and are done with it, before a second attempt at it begins, by the clock after a minute, or at `finish`.
The head of steps.py has the rules.

A row and its number are first in the *state*, an SQLite file, together with how far is read. Then segments that are
read to their end are removed, and W&B gets the row. If the actor dies in between, the next one logs rows again:
online all from the number at which the server goes on, offline those whose number is in no transaction log of the
run.

`Host._read_on`, `Host._read`         host.py: one reading after the other; actor.py has what others can ask
`Run.read`                            run.py: does all that follows
`Reader.read`, `Reader._read_tails`   reading.py: what is new, in the order of time; tail.py reads one outbox
`Reader._look`                        reading.py: at the pages: who is new, who has ended, what was lost
`Inbox.take`, `Inbox._take_record`    inbox.py: whose a report is, which pipeline's, and who has ended
`Pipeline.log`                        pipeline.py: keeps the report until its step is over
`Steps.log`, `Steps.end`              steps.py: what they mean for the steps
`Steps._close_complete`               steps.py: whether a step is over; `Steps.tick` asks the clock
`Run._save`                           run.py: makes rows, commits them to the state (state.py), and gives them to W&B
`Pipeline._row`                       pipeline.py: the reports of a step as a row; reduction.py has the rules
`Writer._log_missing`                 writer.py: after a restart, what W&B has not got; starting.py starts the run

**On another node.** A process that logs there writes down in Ray's GCS where its outbox is, and the pipeline actor
looks there once a second. It starts a *relay* on that node, a small actor that reads in the same way. It calls the
relay again and again. Each call says that the reading before is safe, so that the relay may remove what is read. A
relay ends with its pipeline actor. The next one starts its own, which begin at the positions in the state.

`Relays.look`, `Relays.start`         relay.py: finds the places, and starts relays there
`Relay.read`                          relay.py: one call

What happens when something dies:

a worker           The kernel frees the lock on its page, so the reader says that it has ended. A step that it has not
                   reported waits ten seconds for it, because Ray may start it again.
a relay            Another one is started. What was not committed is still on its node.
a node             What it has not brought is named in the ledger, which is not `ok`.
the pipeline actor Ray starts it again, and takeover.py opens its state. Rows that W&B misses are logged again.
wandb-core         The pipeline actor ends itself, and comes back with a new one.
the owner          The process that made the run: the pipeline actor finishes the run as that has ended.
all of Ray         recover.py finishes the run without the actor: its owner calls it, the dying actor does, or you.

The process that makes a run: arguments.py checks what the code says, owner.py starts the pipeline actor, exits.py says
how the process ends.

What else workers log: said.py has alerts, config, summary and log lines. A new kind needs a line in its `TELL`, one
in `KNOWN` if it is to be told again after a restart, and a method of `Handle`. artifacts.py brings an artifact's
files to the run's folder, and logs them. media.py knows W&B's data types.

What these share: ledger.py is the account. nodes.py knows the nodes. What is not public is in ray_internals.py,
wandb_internals.py, transaction_log.py and media.py.
"""

import os

# Under `uv run` Ray would move every worker into a copy of the working directory and build a second environment there.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # read when ray is imported, so import this before
