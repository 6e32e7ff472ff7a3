"""The memory plan: compiles every program of a configuration ahead of time, for devices that need not be present.

`targets` describes the devices, `compilers` finds a compiler for them, `measure` compiles the stages' programs and
reads memory and collectives, `advice` and `fit` find what to change.
"""
