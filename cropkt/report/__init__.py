"""Tables, figures and the page of a study, made from nothing but its results dictionary.

`write.write_report` leaves numbers, tables and two figures when a study ends, `page.write_page`
the HTML page with everything; `tables` needs no matplotlib, so a terminal summary is quick.
"""
