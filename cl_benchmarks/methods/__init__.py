"""Methods that learn a stream: DynamicMoE and what it is compared with, one file each."""
