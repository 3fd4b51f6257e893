"""Recorded benchmark runs: kept in a folder, compared with one another, told.

`records` keeps them and `check` compares them with the standard library alone; `report`, which
draws and writes pages, needs the extra ``idml_fast[train]``.
"""
