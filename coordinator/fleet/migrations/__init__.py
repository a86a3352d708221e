"""How the ledger's tables came to be, one file a step. Run by `Ledger.migrate`, never by hand."""
