"""What the coordinator knows of its fleet, and what it gives out.

ledger.py       what nodes said, releases, rounds, people; migrations/ builds its tables, tables.py names them
listening.py    MQTT into the ledger, and the acknowledgement after it
publishing.py   releases, signed and laid out as a TUF repository
repository.py   that repository over HTTP
"""
