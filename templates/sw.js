// Bellhop's service worker: shows push messages, opens what they are about, takes away what was read elsewhere.
"use strict";

addEventListener("install", () => skipWaiting());
addEventListener("activate", (event) => event.waitUntil(clients.claim()));

function inside(url) {
	// A message may lead only to this site.
	const target = new URL(url ?? "/", location.origin);
	return target.origin === location.origin ? target.href : location.origin + "/";
}

async function show(event) {
	let message = {};
	try {
		message = event.data.json();
	} catch {
		// A push must show something, even one that nobody can read.
	}
	await registration.showNotification(message.title ?? "Bellhop", {
		tag: message.tag ?? message.id,
		renotify: Boolean(message.tag ?? message.id),
		requireInteraction: message.severity === "critical",
		data: { id: message.id, url: inside(message.url) },
	});
	await closeRead();
}

async function closeRead() {
	for (const shown of await registration.getNotifications()) {
		const id = shown.data?.id;
		const response = id && (await fetch("/api/notifications/" + encodeURIComponent(id)).catch(() => null));
		if (!response?.ok) continue;
		const { notification } = await response.json();
		if (notification.read_at || notification.archived_at) shown.close();
	}
}

async function open(url) {
	const pages = await clients.matchAll({ type: "window", includeUncontrolled: true });
	const page = pages.find((one) => one.url === url);
	return page ? page.focus() : clients.openWindow(url);
}

addEventListener("push", (event) => event.waitUntil(show(event)));
addEventListener("message", (event) => event.waitUntil(closeRead()));
addEventListener("notificationclick", (event) => {
	event.notification.close();
	event.waitUntil(open(inside(event.notification.data?.url)));
});
