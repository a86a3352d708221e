"""How good a model file is, how sure we are of that, and the pages that say so."""
