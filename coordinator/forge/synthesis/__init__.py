"""New training targets from a teacher: samples, hard gates, a consistency score, an audit by a second teacher."""
