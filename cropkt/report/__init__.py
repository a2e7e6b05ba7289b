"""Tables and figures of a study, made from nothing but its results dictionary.

`write.write_report` writes them all; `tables` needs no matplotlib, so a terminal summary is quick.
"""
