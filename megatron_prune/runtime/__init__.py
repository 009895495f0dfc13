"""Where the run happens. Passed in everywhere, never global.

device       CUDA or CPU;  folders  whether one can be written, and files that are whole at every moment
places       which rank this process is, from torchrun's, Slurm's or Kubeflow's variables
rendezvous   the store at which ranks meet;  agreement  what they compare there;  join  both, then the mesh
mesh         process groups
failures     what is told, with which status;  voice  by which rank;  signals  asked to stop;  bounded  work with limits
"""
