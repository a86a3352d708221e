"""Asking peers and answering for them, over MQTT and through the durable outbox.

link        everything below, wired: one session, one outbox, one drain; what `node.app` builds and ticks
asking      a question to one or several peers, and what their replies do
serving     answering other nodes' questions
consensus   which of several replies stands (no I/O)
presence    this node's birth, heartbeat and death; who else is there
reporting   events for the coordinator's ledger, kept until its Ack
"""
