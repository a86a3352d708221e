"""A site's node: answers alone, asks a peer when unsure, learns at home, takes signed releases.

app          builds everything, threads with one owner each      answering   the use cases: answer, apply a reply, expire, correct
store        SQLite: answers, examples, refused input            settings    what can be set
messaging    the broker side, wired together                     cli, client, doctor   the command line
api/         the local HTTP API                                  engine/     the thread that owns the model; loading and proving one
escalation/  asking peers, answering them, presence              update/     signed releases, download, slots
energy/      what the node lives on, and what waits for the sun     memory/   confirmed answers and patterns that answer again
learn/       LoRA training and sync windows; the only room with torch and flwr, in processes of their own
"""
