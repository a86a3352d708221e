"""What the teacher said and how sure it was, captured once and kept on disk.

cache packing    shards with CRC, three modes, many writers, one reader
score capture    a torch model's view of written answers; asking it, record by record
"""
