"""Alembic's entry: runs the steps on the connection that `Ledger.migrate` opened, inside its transaction."""

from alembic import context

from coordinator.fleet.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
