"""New training targets from a teacher: samples, hard gates, a consistency score, an audit by a second teacher.

sampling rows            how many samples a source gets; all of them on disk, with the reason
gates scoring language   what must hold; what ranks the rest; which language it is
mixing audit             generic records among them; a second teacher's suspicions
made                     what stands beside a file of targets and goes into the student's lineage
"""
