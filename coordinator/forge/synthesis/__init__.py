"""New training targets from a teacher: samples, hard gates, a consistency score, an audit by a second teacher.

gates      what a text must pass, and the reason where it does not: the one gate of the forge
language   which language a text is in
scoring    how consistent a text is with its source, its teacher and the other samples: a rank, never called quality
sampling   how many samples each source gets, and what is kept of them
rows       a source and all that was said to it, on disk, resumable to the row
mixing     from rows to training records, with generic ones among them
audit      a second teacher looks for targets that their source does not explain
"""
