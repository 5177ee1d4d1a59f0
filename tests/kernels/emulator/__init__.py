"""Runs the PTX of a compiled kernel on a CPU, a block at a time, as numpy vectors over the block's threads.

    ptx.py           text → instructions, labels, register types
    table.py         mnemonic → the function that compiles it
    threads.py       registers of some warps, and how operands are read and written
    scalar.py        instructions of one thread, by mnemonic
    exchange.py      shuffles, loads, stores, atomics, copies to shared memory, barriers, fences
    matrix.py        ldmatrix, stmatrix, mma.sync
    wgmma.py         products of a group of four warps
    floats.py        bfloat16, float16 and tf32 as bits
    memory.py        global and shared memory, and the report of races
    machine.py       a block, in lockstep or warp after warp, and a grid of blocks
    launch.py        `emulate(target)`: launches of Triton kernels on CPU tensors are compiled for a GPU and run here

What the emulator does not know stops with its name (`Unsupported`); what a GPU would leave undefined, or refuse,
stops with the instruction (`EmulationError`). Accesses that nothing orders are counted (`RaceReport`).
"""
