//! Programs of every kind in pods, hostile ones included. Everything runs in this process: what
//! goes wrong here would go wrong in the daemon.

mod control;
mod files;
mod hostile;
mod programs;
mod support;
