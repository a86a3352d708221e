"""Asking peers and answering for them, over MQTT and through the durable outbox. Wired together in `node.messaging`.

asking      a question to one or several peers, and what their replies do
serving     answering other nodes' questions
consensus   which of several replies stands (no I/O)
presence    this node's birth, heartbeat and death; who else is there
radio       frames instead of messages, and the gateway that speaks for those who say them
reporting   events for the coordinator's ledger, kept until its Ack
"""
