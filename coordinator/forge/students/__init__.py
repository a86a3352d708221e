"""What the student is: vocabulary, blocks, widths, weight types, and the file it becomes.

trim                the pieces that a task needs, closed under merges
cut width scratch   presets; which blocks, channels, neurons and heads stay; or from nothing
ternary             weights of three values
importance export   what quantising must spare; the file
"""
