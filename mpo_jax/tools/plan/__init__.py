"""The memory plan: every program of a configuration compiled ahead of time for devices that need not be here.

`targets` says what the devices are, `compilers` finds a compiler for them, `programs` is the seam to the stages,
`measure` compiles and reads memory and collectives, `flops` counts arithmetic, `advice` and `fit` say what to change.
"""
