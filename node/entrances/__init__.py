"""Further ways in, beside HTTP: a folder of files and a topic on the site's own broker. Both hand their records to `node.answering`.

taking   one record in, what to say about it out; the same record is answered once, however often it comes
spool    records as files, answers as files of the same name
topic    records and answers over MQTT 5
"""
