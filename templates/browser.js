// What concerns this browser: its own alerts, and leaving it. page.js fetches this file when it is wanted; api, attempt,
// word and toast are its functions. Alerts come only while no page of ours is in view, once a notification, never unasked.

const granted = () => globalThis.Notification?.permission === "granted";

export async function toggleAlerts() {
	const on = localStorage.alerts !== "on" && (await Notification.requestPermission()) === "granted";
	localStorage.alerts = on ? "on" : "off";
	if (on) await navigator.serviceWorker.register("/sw.js");
	toast(word(on ? "js.alerts_on" : Notification.permission === "denied" ? "js.alerts_no" : "js.alerts_off"));
	return on;
}

function unseen(newest) {
	// The newest notification any page of this browser knows: what is above it is news. The first look makes no noise.
	const before = localStorage.seen ?? newest ?? "";
	if (!localStorage.seen || newest > before) localStorage.seen = newest ?? "";
	return newest > before ? before : null;
}

export async function about(newest, leading) {
	// A page in view comes first and takes the news silently; of the hidden ones only the one with the stream speaks.
	if (document.hidden) await new Promise((done) => setTimeout(done, 300));
	if (document.hidden && !leading) return;
	const before = unseen(newest);
	if (!document.hidden || before === null || !granted()) return;
	const { notifications } = await api("GET", "/api/notifications?unread=1&limit=3");
	const worker = await navigator.serviceWorker.ready;
	for (const { id, title, summary } of notifications.filter((one) => one.id > before)) {
		// The tag is the same as a push has: whichever comes second replaces the first.
		worker.active.postMessage({ id, title: summary || title, url: "/n/" + id });
	}
}

export async function signOut() {
	// The next person at this browser must not get this one's push messages.
	const worker = await navigator.serviceWorker?.getRegistration();
	const push = await worker?.pushManager?.getSubscription();
	if (push) await attempt("DELETE", "/api/push/subscriptions", { endpoint: push.endpoint });
	await push?.unsubscribe();
	if (await attempt("POST", "/logout")) location.assign("/login");
}
