"""Which connection of a boot a node's last word came by: a late death of an earlier one is told from a new one."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("nodes", sa.Column("connection", sa.BigInteger(), nullable=False, server_default="0"))
