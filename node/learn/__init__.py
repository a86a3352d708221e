"""What a site learned, and how it leaves: as one flat array of adapter factors, never as text.

examples    confirmed answers -> training and held-out parts       train      LoRA on the active release, within a budget
stored      the trained adapter on disk, whole or not at all       sync       a window in which the coordinator may ask for it
flower      the only file here that imports flwr                   commands   `milpa-node learn`, `milpa-node sync`

The daemon imports none of it but `commands`, which loads neither torch nor flwr. Training and syncing are processes that end.
"""
