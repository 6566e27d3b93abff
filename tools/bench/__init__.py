"""Measures ringnet beside its peers: see docs/performance.md; `tools/bench/run --help`.

    __main__.py   the command line
    compare.py    the order of runs: repetitions, MTUs, drivers, rows
    lab.py        three network namespaces: guest, host, server
    drivers.py    what is measured, as commands; starts and ends one
    rows.py       what is done with it: a row a kind of work
    load.py       the traffic generators (load/*.c), compiled when needed
    procs.py      CPU, switches and memory of a process tree, by stage
    results.py    the JSON file
    stats.py      medians, ranges, ratios
    targets.py    what ringnet is to reach
    report.py     tables, from the JSON alone
    plots.py      pictures, from the JSON alone (needs matplotlib)
    where.py      system calls, sleeps and functions behind a request: tools/bench/where
    micro.py      parts of the data plane by themselves (microbench/*.c): tools/bench/micro

Rows of one comparison are run in turn for each driver, then all again: what the machine does meanwhile hits all alike.
"""
