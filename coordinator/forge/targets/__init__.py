"""What the teacher said and how sure it was, captured once and kept on disk."""
