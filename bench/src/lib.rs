//! Load generators and topologies.
