//! Throwaway.
#![allow(missing_docs, clippy::unwrap_used)]
use std::time::Instant;
use vmem::{IoDriver, MemoryTier, ReadOptions, VirtualMemoryConfig};
fn cpu() -> f64 {
    let s = std::fs::read_to_string("/proc/self/stat").unwrap();
    let f: Vec<&str> = s.rsplit(')').next().unwrap().split_whitespace().collect();
    (f[11].parse::<f64>().unwrap() + f[12].parse::<f64>().unwrap()) / 100.0
}
#[tokio::main]
async fn main() {
    let only = std::env::args().nth(1);
    for (size, total) in [(4096usize, 512usize << 20), (65536, 512 << 20), (1 << 20, 1 << 30)] {
        let count = total / size;
        for driver in ["reactor", "tokio-uring", "blocking"] {
            if only.as_ref().is_some_and(|o| o != driver) {
                continue;
            }
            let config = VirtualMemoryConfig::builder()
                .host_capacity(192 << 20)
                .disk_capacity(2 << 30)
                .disk_path(format!("/var/tmp/p3-{driver}"))
                .io_driver(driver.parse::<IoDriver>().unwrap())
                .build()
                .unwrap();
            let vmem = vmem::open(config).await.unwrap();
            let mut handles = Vec::new();
            for n in 0..count {
                handles.push(vmem.put(vec![n as u8; size], MemoryTier::Disk).await.unwrap());
            }
            println!("{}", vmem.capabilities().disk);
            let handles = std::sync::Arc::new(handles);
            for depth in [1usize, 16, 64] {
                let (began, cpu0) = (Instant::now(), cpu());
                let secs = 2.0;
                let tasks: Vec<_> = (0..depth)
                    .map(|d| {
                        let (vmem, handles) = (vmem.clone(), handles.clone());
                        tokio::spawn(async move {
                            let mut x = 0x9E3779B97F4A7C15u64.wrapping_mul(d as u64 + 1);
                            let mut lat = Vec::new();
                            while began.elapsed().as_secs_f64() < secs {
                                x ^= x << 13;
                                x ^= x >> 7;
                                x ^= x << 17;
                                let h = &handles[(x % handles.len() as u64) as usize];
                                let t = Instant::now();
                                let b = vmem
                                    .read_with(h, ReadOptions::new().promote(false))
                                    .await
                                    .unwrap();
                                assert_eq!(b.len(), handles[0].len());
                                lat.push(t.elapsed().as_nanos() as u32 / 100);
                            }
                            lat
                        })
                    })
                    .collect();
                let mut all = Vec::new();
                for t in tasks {
                    all.extend(t.await.unwrap());
                }
                let e = began.elapsed().as_secs_f64();
                all.sort_unstable();
                println!(
                    "{size:>8} d{depth:<3} {driver:<12} {:>9.0}/s p50 {:>8.1} p99 {:>8.1} us cpu {:>6.1} us/op",
                    all.len() as f64 / e,
                    all[all.len() / 2] as f64 / 10.0,
                    all[all.len() * 99 / 100] as f64 / 10.0,
                    (cpu() - cpu0) * 1e6 / all.len() as f64
                );
            }
            vmem.close().await.unwrap();
        }
    }
}
