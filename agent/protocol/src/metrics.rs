//! `io.containerd.cgroups.v2`: containerd's cgroup v2 metrics (cgroups cgroup2/stats/metrics.proto).
//! Memory in bytes, times in microseconds, as the kernel gives them.

use alloc::string::String;
use alloc::vec::Vec;

/// Type URL under which containerd knows [`Metrics`].
pub const METRICS_TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// What Task.Stats answers.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Metrics {
    /// Processes.
    #[prost(message, optional, tag = "1")]
    pub pids: Option<PidsStat>,
    /// CPU time.
    #[prost(message, optional, tag = "2")]
    pub cpu: Option<CPUStat>,
    /// Memory.
    #[prost(message, optional, tag = "4")]
    pub memory: Option<MemoryStat>,
    /// RDMA.
    #[prost(message, optional, tag = "5")]
    pub rdma: Option<RdmaStat>,
    /// Block I/O.
    #[prost(message, optional, tag = "6")]
    pub io: Option<IOStat>,
    /// Huge pages.
    #[prost(message, repeated, tag = "7")]
    pub hugetlb: Vec<HugeTlbStat>,
    /// Memory events.
    #[prost(message, optional, tag = "8")]
    pub memory_events: Option<MemoryEvents>,
    /// Network interfaces.
    #[prost(message, repeated, tag = "9")]
    pub network: Vec<NetworkStat>,
}

/// `PSIData` of containerd's cgroup v2 metrics.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct PSIData {
    /// Share of time in % over 10 s.
    #[prost(double, tag = "1")]
    pub avg10: f64,
    /// Share of time in % over 60 s.
    #[prost(double, tag = "2")]
    pub avg60: f64,
    /// Share of time in % over 300 s.
    #[prost(double, tag = "3")]
    pub avg300: f64,
    /// Stall time in µs.
    #[prost(uint64, tag = "4")]
    pub total: u64,
}

/// `PSIStats` of containerd's cgroup v2 metrics.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct PSIStats {
    /// Some tasks stalled.
    #[prost(message, optional, tag = "1")]
    pub some: Option<PSIData>,
    /// All tasks stalled.
    #[prost(message, optional, tag = "2")]
    pub full: Option<PSIData>,
}

/// `PidsStat` of containerd's cgroup v2 metrics.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct PidsStat {
    /// Current, as in the cgroup file.
    #[prost(uint64, tag = "1")]
    pub current: u64,
    /// Limit, as in the cgroup file.
    #[prost(uint64, tag = "2")]
    pub limit: u64,
}

/// `CPUStat` of containerd's cgroup v2 metrics.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct CPUStat {
    /// Usage usec, as in the cgroup file.
    #[prost(uint64, tag = "1")]
    pub usage_usec: u64,
    /// User usec, as in the cgroup file.
    #[prost(uint64, tag = "2")]
    pub user_usec: u64,
    /// System usec, as in the cgroup file.
    #[prost(uint64, tag = "3")]
    pub system_usec: u64,
    /// Nr periods, as in the cgroup file.
    #[prost(uint64, tag = "4")]
    pub nr_periods: u64,
    /// Nr throttled, as in the cgroup file.
    #[prost(uint64, tag = "5")]
    pub nr_throttled: u64,
    /// Throttled usec, as in the cgroup file.
    #[prost(uint64, tag = "6")]
    pub throttled_usec: u64,
    /// Pressure.
    #[prost(message, optional, tag = "7")]
    pub psi: Option<PSIStats>,
    /// Nr bursts, as in the cgroup file.
    #[prost(uint64, tag = "8")]
    pub nr_bursts: u64,
    /// Burst usec, as in the cgroup file.
    #[prost(uint64, tag = "9")]
    pub burst_usec: u64,
}

/// `MemoryStat` of containerd's cgroup v2 metrics.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct MemoryStat {
    /// Anon, as in the cgroup file.
    #[prost(uint64, tag = "1")]
    pub anon: u64,
    /// File, as in the cgroup file.
    #[prost(uint64, tag = "2")]
    pub file: u64,
    /// Kernel stack, as in the cgroup file.
    #[prost(uint64, tag = "3")]
    pub kernel_stack: u64,
    /// Slab, as in the cgroup file.
    #[prost(uint64, tag = "4")]
    pub slab: u64,
    /// Sock, as in the cgroup file.
    #[prost(uint64, tag = "5")]
    pub sock: u64,
    /// Shmem, as in the cgroup file.
    #[prost(uint64, tag = "6")]
    pub shmem: u64,
    /// File mapped, as in the cgroup file.
    #[prost(uint64, tag = "7")]
    pub file_mapped: u64,
    /// File dirty, as in the cgroup file.
    #[prost(uint64, tag = "8")]
    pub file_dirty: u64,
    /// File writeback, as in the cgroup file.
    #[prost(uint64, tag = "9")]
    pub file_writeback: u64,
    /// Anon thp, as in the cgroup file.
    #[prost(uint64, tag = "10")]
    pub anon_thp: u64,
    /// Inactive anon, as in the cgroup file.
    #[prost(uint64, tag = "11")]
    pub inactive_anon: u64,
    /// Active anon, as in the cgroup file.
    #[prost(uint64, tag = "12")]
    pub active_anon: u64,
    /// Inactive file, as in the cgroup file.
    #[prost(uint64, tag = "13")]
    pub inactive_file: u64,
    /// Active file, as in the cgroup file.
    #[prost(uint64, tag = "14")]
    pub active_file: u64,
    /// Unevictable, as in the cgroup file.
    #[prost(uint64, tag = "15")]
    pub unevictable: u64,
    /// Slab reclaimable, as in the cgroup file.
    #[prost(uint64, tag = "16")]
    pub slab_reclaimable: u64,
    /// Slab unreclaimable, as in the cgroup file.
    #[prost(uint64, tag = "17")]
    pub slab_unreclaimable: u64,
    /// Pgfault, as in the cgroup file.
    #[prost(uint64, tag = "18")]
    pub pgfault: u64,
    /// Pgmajfault, as in the cgroup file.
    #[prost(uint64, tag = "19")]
    pub pgmajfault: u64,
    /// Workingset refault, as in the cgroup file.
    #[prost(uint64, tag = "20")]
    pub workingset_refault: u64,
    /// Workingset activate, as in the cgroup file.
    #[prost(uint64, tag = "21")]
    pub workingset_activate: u64,
    /// Workingset nodereclaim, as in the cgroup file.
    #[prost(uint64, tag = "22")]
    pub workingset_nodereclaim: u64,
    /// Pgrefill, as in the cgroup file.
    #[prost(uint64, tag = "23")]
    pub pgrefill: u64,
    /// Pgscan, as in the cgroup file.
    #[prost(uint64, tag = "24")]
    pub pgscan: u64,
    /// Pgsteal, as in the cgroup file.
    #[prost(uint64, tag = "25")]
    pub pgsteal: u64,
    /// Pgactivate, as in the cgroup file.
    #[prost(uint64, tag = "26")]
    pub pgactivate: u64,
    /// Pgdeactivate, as in the cgroup file.
    #[prost(uint64, tag = "27")]
    pub pgdeactivate: u64,
    /// Pglazyfree, as in the cgroup file.
    #[prost(uint64, tag = "28")]
    pub pglazyfree: u64,
    /// Pglazyfreed, as in the cgroup file.
    #[prost(uint64, tag = "29")]
    pub pglazyfreed: u64,
    /// Thp fault alloc, as in the cgroup file.
    #[prost(uint64, tag = "30")]
    pub thp_fault_alloc: u64,
    /// Thp collapse alloc, as in the cgroup file.
    #[prost(uint64, tag = "31")]
    pub thp_collapse_alloc: u64,
    /// Bytes now, or entries per device.
    #[prost(uint64, tag = "32")]
    pub usage: u64,
    /// Usage limit, as in the cgroup file.
    #[prost(uint64, tag = "33")]
    pub usage_limit: u64,
    /// Swap usage, as in the cgroup file.
    #[prost(uint64, tag = "34")]
    pub swap_usage: u64,
    /// Swap limit, as in the cgroup file.
    #[prost(uint64, tag = "35")]
    pub swap_limit: u64,
    /// Max usage, as in the cgroup file.
    #[prost(uint64, tag = "36")]
    pub max_usage: u64,
    /// Swap max usage, as in the cgroup file.
    #[prost(uint64, tag = "37")]
    pub swap_max_usage: u64,
    /// Pressure.
    #[prost(message, optional, tag = "38")]
    pub psi: Option<PSIStats>,
}

/// `MemoryEvents` of containerd's cgroup v2 metrics.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct MemoryEvents {
    /// Low, as in the cgroup file.
    #[prost(uint64, tag = "1")]
    pub low: u64,
    /// High, as in the cgroup file.
    #[prost(uint64, tag = "2")]
    pub high: u64,
    /// Max, as in the cgroup file.
    #[prost(uint64, tag = "3")]
    pub max: u64,
    /// Oom, as in the cgroup file.
    #[prost(uint64, tag = "4")]
    pub oom: u64,
    /// Oom kill, as in the cgroup file.
    #[prost(uint64, tag = "5")]
    pub oom_kill: u64,
    /// Oom group kill, as in the cgroup file.
    #[prost(uint64, tag = "6")]
    pub oom_group_kill: u64,
}

/// `RdmaStat` of containerd's cgroup v2 metrics.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct RdmaStat {
    /// Current, as in the cgroup file.
    #[prost(message, repeated, tag = "1")]
    pub current: Vec<RdmaEntry>,
    /// Limit, as in the cgroup file.
    #[prost(message, repeated, tag = "2")]
    pub limit: Vec<RdmaEntry>,
}

/// `RdmaEntry` of containerd's cgroup v2 metrics.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct RdmaEntry {
    /// Device.
    #[prost(string, tag = "1")]
    pub device: String,
    /// Hca handles, as in the cgroup file.
    #[prost(uint32, tag = "2")]
    pub hca_handles: u32,
    /// Hca objects, as in the cgroup file.
    #[prost(uint32, tag = "3")]
    pub hca_objects: u32,
}

/// `IOStat` of containerd's cgroup v2 metrics.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IOStat {
    /// Bytes now, or entries per device.
    #[prost(message, repeated, tag = "1")]
    pub usage: Vec<IOEntry>,
    /// Pressure.
    #[prost(message, optional, tag = "2")]
    pub psi: Option<PSIStats>,
}

/// `IOEntry` of containerd's cgroup v2 metrics.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct IOEntry {
    /// Device major number.
    #[prost(uint64, tag = "1")]
    pub major: u64,
    /// Device minor number.
    #[prost(uint64, tag = "2")]
    pub minor: u64,
    /// Rbytes, as in the cgroup file.
    #[prost(uint64, tag = "3")]
    pub rbytes: u64,
    /// Wbytes, as in the cgroup file.
    #[prost(uint64, tag = "4")]
    pub wbytes: u64,
    /// Rios, as in the cgroup file.
    #[prost(uint64, tag = "5")]
    pub rios: u64,
    /// Wios, as in the cgroup file.
    #[prost(uint64, tag = "6")]
    pub wios: u64,
}

/// `HugeTlbStat` of containerd's cgroup v2 metrics.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct HugeTlbStat {
    /// Current, as in the cgroup file.
    #[prost(uint64, tag = "1")]
    pub current: u64,
    /// Max, as in the cgroup file.
    #[prost(uint64, tag = "2")]
    pub max: u64,
    /// Page size.
    #[prost(string, tag = "3")]
    pub pagesize: String,
    /// Failcnt, as in the cgroup file.
    #[prost(uint64, tag = "4")]
    pub failcnt: u64,
}

/// `NetworkStat` of containerd's cgroup v2 metrics.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct NetworkStat {
    /// Interface.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Rx bytes, as in the cgroup file.
    #[prost(uint64, tag = "2")]
    pub rx_bytes: u64,
    /// Rx packets, as in the cgroup file.
    #[prost(uint64, tag = "3")]
    pub rx_packets: u64,
    /// Rx errors, as in the cgroup file.
    #[prost(uint64, tag = "4")]
    pub rx_errors: u64,
    /// Rx dropped, as in the cgroup file.
    #[prost(uint64, tag = "5")]
    pub rx_dropped: u64,
    /// Tx bytes, as in the cgroup file.
    #[prost(uint64, tag = "6")]
    pub tx_bytes: u64,
    /// Tx packets, as in the cgroup file.
    #[prost(uint64, tag = "7")]
    pub tx_packets: u64,
    /// Tx errors, as in the cgroup file.
    #[prost(uint64, tag = "8")]
    pub tx_errors: u64,
    /// Tx dropped, as in the cgroup file.
    #[prost(uint64, tag = "9")]
    pub tx_dropped: u64,
}
