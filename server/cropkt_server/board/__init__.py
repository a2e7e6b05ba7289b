"""The live board: one page on which a coordinator sees a study, and may act on it.

`guard` lets nobody in but who holds the token; `observer` reads the study's files and changes
none; `views` lays out what the page shows; `app` answers; `process` runs it, alone or beside a
coordinator.
"""
