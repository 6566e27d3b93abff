"""Handles on the shared objects of a session; knows no stage.

memory.py   an object: create, attach, detach, destroy; the errors
ring.py     frame descriptors, one producer and one consumer
arena.py    frame buffers
cell.py     stage cells and counters
flows.py    the flow table
names.py    names of addresses, from DNS answers
view.py     all of it, read-only, for the monitor
"""
