#![allow(missing_docs)]
use vmem::*;
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn smoke() {
    let config = VirtualMemoryConfig::builder()
        .host_capacity(4 << 20)
        .disk_capacity(256 << 20)
        .build()
        .unwrap();
    let v = open(config).await.unwrap();
    let mut hs = vec![];
    for i in 0..2000usize {
        let len = [100, 4096, 70_000, 5000, 1][i % 5];
        let h = v
            .put(vec![i as u8; len], if i % 7 == 0 { MemoryTier::Disk } else { MemoryTier::Host })
            .await
            .unwrap();
        hs.push(h);
    }
    println!("{:#?}", v.stats());
    for r in 0..3 {
        for (i, h) in hs.iter().enumerate() {
            let b = v.read(h).await.unwrap();
            assert!(b.len() == h.len() && b.iter().all(|x| *x == i as u8), "{r} {i}");
        }
    }
    println!("{:#?}", v.stats());
    drop(hs);
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    println!("{:#?}", v.stats());
    v.close().await.unwrap();
}
