"""The same rules over grids: cells, tables, views."""
