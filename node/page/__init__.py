"""The node's own web page, for whoever stands beside the machine: what it answers, what it is unsure of, one tap to put it right.

routes   the paths, thin           views   what is read from the store      pages   values become HTML
words    every text, in two languages       door   who may come in           html    text that is escaped unless it is HTML
static/  one style sheet, one script, one picture
"""
