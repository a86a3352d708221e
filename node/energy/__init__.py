"""What the node lives on, and what may wait for the sun. Answering never asks here.

rules      sources, the sun, reserve and hysteresis, what may run now; no I/O     readings   the battery's own word: sysfs, or a small file
book       joules by kind of work and by day, kept on disk                        power      all of it together: `Power.now`, `Power.may`
"""
