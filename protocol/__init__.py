"""What both sides agree on: names, messages, topics, tasks, releases, adapters, model files.

errors     the error tree                      names      what may be called how
messages   the words on the wire               codec      bytes <-> words, checked once
topics     where each word travels             mqtt       one MQTT 5 session, with deadlines
outbox     what must not be lost               drain      handing it over
settings   TOML + environment + flags, with origins
tasks      record -> prompt -> answer          releases   what a release is
adapters   LoRA header and flat layout         blobs      files by digest
lines      words to and from a child process   ports      a free one for a server of ours
flower     what keeps flwr off the network     confidence when an answer stands
models/    model files: tensors, tokeniser, engine, LoRA, the one training loop (torch only inside, never at import of this package)

Imports nothing of ours from outside this folder.
"""

__version__ = "0.1.0"
