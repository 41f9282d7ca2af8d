#![no_main]
//! Client frames: nothing panics, and what was decoded survives being encoded.

use isobar_protocol::ids::PeerId;
use isobar_protocol::wire::{
    ClientFrame, PeerFrame, encode_ephemeral, encode_remote_heads_changed, encode_sync,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = PeerFrame::decode(data);
    let Ok(frame) = ClientFrame::decode(data) else { return };
    let target = PeerId::new("target").expect("a short name");
    let again = match &frame {
        ClientFrame::Sync { request, sender_id, document, data } => {
            let Ok(sender) = PeerId::new(sender_id) else { return };
            encode_sync(*request, &sender, &target, document, data)
        }
        // Counts beyond 53 bits leave as floats, which do not hold them.
        ClientFrame::Ephemeral { sender_id, document, session_id, count, data } if *count < 1 << 53 => {
            encode_ephemeral(sender_id, &target, document, session_id, *count, data)
        }
        ClientFrame::RemoteHeadsChanged { sender_id, document, heads } => {
            let Ok(sender) = PeerId::new(sender_id) else { return };
            encode_remote_heads_changed(&sender, &target, document, heads)
        }
        _ => return,
    };
    assert_eq!(ClientFrame::decode(&again).as_ref(), Ok(&frame));
});
